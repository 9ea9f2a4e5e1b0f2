"""Pure tensor maths: one file an algorithm, no modules, no names, no files."""
