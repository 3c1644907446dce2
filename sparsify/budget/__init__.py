"""What a pruning run will need (memory, disk, time), from shapes and a short calibration, before it begins."""
