"""What other libraries load from here: the vLLM plugin and the transformers quantizer."""
