"""loraformat: a file format for LoRA adapters, and the tools that merge them without torch.

The public face. Names are imported when they are first used, so `import loraformat` is cheap.
"""
