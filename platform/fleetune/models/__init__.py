"""The frozen base model, its submodels, and LoRA adapters over whole cohorts."""
