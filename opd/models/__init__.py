"""Speech LLM families. opd/models/registry.py says which there are, without importing torch."""
