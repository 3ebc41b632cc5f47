"""The tokenizer, the scripts that write token files, and the loader that reads them."""
