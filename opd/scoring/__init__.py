"""What an answer is worth: rules, judges, and the scoring of public benchmarks. Imports no torch."""
