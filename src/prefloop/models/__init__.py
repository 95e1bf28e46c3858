"""Hugging Face models on token batches: loading, attention, heads, adapters, export."""
