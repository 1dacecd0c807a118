"""What an ONNX file is made of: the walk over its bytes, its tensors, and what is written of it."""
