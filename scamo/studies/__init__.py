"""Studies: grids of cells that run one after another, resume, and end in one table and one page."""
