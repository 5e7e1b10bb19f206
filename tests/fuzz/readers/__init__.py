"""One module for each reader of foreign files; tests/fuzz/__init__.py says how to add one."""
