"""What a model is made of: parameters by component and layer, bytes, memory, tokens; from a config alone where the
weights are not here. And where a mixture of experts sends a text."""
