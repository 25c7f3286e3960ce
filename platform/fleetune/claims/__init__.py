"""What a paper claims, as a part of a sweep: how it is written down, which trials it compares, and whether they bear it out."""
