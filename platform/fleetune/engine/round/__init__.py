"""A round before its work: who takes part, what each is given, what it costs, how it ends."""
