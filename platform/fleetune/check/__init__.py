"""The contract that every method keeps, as functions that anybody can call on a method of their own."""
