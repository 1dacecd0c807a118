"""What a base of ONNX graphs is made of: sites, names, values, codes, and what a graph can be given."""
