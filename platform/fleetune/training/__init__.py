"""Local work: the plan that a method gives, the trainer that carries it out, and evaluation."""
