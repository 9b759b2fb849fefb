"""The argument forms of other libraries over our public ops, one module each: import the one that is wanted."""
