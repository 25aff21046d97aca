"""FSDP2 over CPU processes, to test what Accelerate does on other devices only."""

from accelerate import Accelerator, DistributedType, PartialState

from pytorch_accelerated.engines import launch


class ShardingAccelerator(Accelerator):
    """Shards wherever it runs."""

    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        super().__init__(*args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is None:
            return
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)


launch.Accelerator = ShardingAccelerator
