"""The method: teacher contexts, teacher prompts and the loss. Nothing here depends on workers or batches."""
