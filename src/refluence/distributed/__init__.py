"""The train side in parts: on the workers of a Dask cluster, or in the processes of a torch.distributed group."""
