"""Pages, figures and statistics, made from run directories."""
