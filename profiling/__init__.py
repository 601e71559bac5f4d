"""Scripts that predict, measure and compare, and what they share. None of it is in the wheel."""
