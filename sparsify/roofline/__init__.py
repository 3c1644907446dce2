"""What a device could do at best for the work of a model, and what sparsity could gain there."""
