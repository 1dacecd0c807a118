"""The command line of loraformat: parses flags, calls the face, prints. No arithmetic and no formats."""
