"""The seams to transformers and PEFT."""
