"""Trains on the hosts of a Ray cluster, one worker on each.

`python deploy/ray_train.py --hosts 2 --gpus-per-host 8`, and then the flags of train.py.
"""

import argparse
import socket

import ray
from ray.train import ScalingConfig, get_context
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.jax import JaxTrainer


def train(config: dict[str, list[str]]) -> None:
    """Runs train.py in this worker, with the arguments in `config["words"]`."""
    # Not imported in the script that starts the workers, where JAX could take their accelerators.
    import jax

    from moss_jax.train.__main__ import main

    # JaxTrainer initializes jax.distributed only for workers that have accelerators.
    words = config["words"]
    by_hand = not jax.distributed.is_initialized()
    if by_hand:
        context = get_context()
        coordinator = broadcast_from_rank_zero(f"{ray.util.get_node_ip_address()}:{free_port()}")
        size, rank = context.get_world_size(), context.get_world_rank()
        words = [*words, "--coordinator", coordinator, "--processes", str(size), "--process-id", str(rank)]
    if code := main(words):
        raise RuntimeError(f"train.py ended with exit code {code}; its output says why")
    if by_hand:
        jax.distributed.shutdown()


def free_port() -> int:
    """Returns a free TCP port."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--hosts", type=int, required=True)
    parser.add_argument("--gpus-per-host", type=int, default=0)
    args, words = parser.parse_known_args()
    scaling = ScalingConfig(
        num_workers=args.hosts,
        use_gpu=args.gpus_per_host > 0,
        # JaxTrainer shows every worker the GPUs from 0 on: two workers on one host would use the same ones.
        resources_per_worker={"GPU": args.gpus_per_host} if args.gpus_per_host else None,
        placement_strategy="SPREAD",
    )
    JaxTrainer(train, train_loop_config={"words": words}, scaling_config=scaling).fit()
