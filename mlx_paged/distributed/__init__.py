"""A model over several processes, each with a device of its own, on `mx.distributed`."""
