"""A device of type cuda that holds no data: what training does on it is recorded."""
