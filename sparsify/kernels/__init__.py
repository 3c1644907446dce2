"""Ways to multiply by a packed weight: ``dispatch`` chooses, a kernel prepares its state once and runs many times."""
