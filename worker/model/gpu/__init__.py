"""Does what a GPU alone needs: layers captured as CUDA graphs, products with quantised weights."""
