"""kvtier: tiered KV-cache offload for LLM serving."""
