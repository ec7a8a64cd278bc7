"""Long sequences: sequence parallelism, tiled compute, activation offload, chunked backpropagation."""
