"""On every policy worker, a rank of DeepSpeed: the student, its teacher, the loss, and checkpoints."""
