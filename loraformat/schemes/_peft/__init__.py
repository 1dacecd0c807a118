"""What reading and writing PEFT's folders takes, part by part."""
