"""How much a model computes: the counts behind MFU, plans and scaling laws."""
