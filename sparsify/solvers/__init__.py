"""Solvers of the layer problem, one method a file; ``quadratic`` holds the objective they share."""
