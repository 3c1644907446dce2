"""The compressed storage format: bitmask and packed values. Written in plain torch: this code is the specification."""
