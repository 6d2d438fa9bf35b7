"""Public benchmarks through lmms-eval, answered by the student's vLLM servers."""
