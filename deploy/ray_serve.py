"""A fleet of live servers on a Ray cluster: replicas of `serve.py` behind one address.

`python deploy/ray_serve.py --slots 8 --replicas 2:6 --gpus-per-replica 1 --token-file tokens --host 0.0.0.0`

Each replica has its own engine and scheduler. A WebSocket stays on the replica that accepted it, and a client
that resumes a session is routed back to it, since session ids are prefixed by replica. Ray adds replicas when
few streams are free. If a replica is lost, its sessions resume on others from their last save, if
`--state-dir` is a folder that all machines share.
"""

import argparse
import hashlib
import os
import pickle
import signal
import threading
from pathlib import Path
from urllib.parse import parse_qs

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig
from ray.serve.request_router import FIFOMixin, RequestRouter

from moss_jax import gin_bindings
from moss_jax.config import EngineConfig, SecurityConfig, ServerConfig, SessionConfig, TokenSampling
from moss_jax.serving.security import check_host, read_tokens
from moss_jax.shipped import shipped

# Room for requests other than streams: for metrics, for models, and for streams that are rejected.
SPARE_REQUESTS = 16


def prefix_of(replica: str) -> str:
    """Prefix of the session ids of a replica."""
    return hashlib.sha256(replica.encode()).hexdigest()[:8]


class StickyRouter(FIFOMixin, RequestRouter):
    """Routes a resumed session to the replica that has it, and new ones to that with the fewest streams."""

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        """Returns candidate replicas for a request; Ray takes the one with the fewest requests."""
        if pending_request is not None and pending_request.args:
            # The ASGI scope, as pickled by Ray's proxy.
            scope = pickle.loads(pending_request.args[0]).asgi_scope
            query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
            session = query.get("session", [""])[0].removeprefix("sess_")
            holders = [r for r in candidate_replicas if session.startswith(prefix_of(r.replica_id.unique_id))]
            if holders:
                return [holders]
        return [candidate_replicas]


def deployment(args: argparse.Namespace) -> serve.Application:
    """Returns the Ray Serve application that the flags describe."""
    gin_bindings.parse([str(shipped("configs/serve.gin")), *args.gin_file], args.gin_param)
    settings = gin_bindings.settings
    engine_config = settings(EngineConfig)
    sampling, session = settings(TokenSampling), settings(SessionConfig)
    server, security = settings(ServerConfig), settings(SecurityConfig)
    tokens = read_tokens(args.token_file, os.environ)
    check_host(args.host, tokens)

    def build():
        """Builds the application of one replica in its process; loading and warm-up precede its traffic."""
        import dataclasses

        from starlette.middleware import Middleware

        from moss_jax.config import SchedulerConfig
        from moss_jax.convert import open_model
        from moss_jax.serving import logs
        from moss_jax.serving.app import make_app
        from moss_jax.serving.hub import Hub, warm_up_all
        from moss_jax.serving.metrics import Metrics
        from moss_jax.serving.security import Gate, protection
        from moss_jax.stream import Engine, Scheduler

        logs.set_up()
        opened = open_model(args.checkpoint)
        config = dataclasses.replace(engine_config, slots=args.slots)
        engine = Engine(opened.model, opened.tokenizer, config, sampling)
        hub = Hub(
            Scheduler(engine, SchedulerConfig(clock="realtime")),
            server,
            session=session,
            model=opened.name,
            state_folder=args.state_dir,
            id_prefix=prefix_of(serve.get_replica_context().replica_id.unique_id),
        )
        if args.warm_up:
            warm_up_all(engine, hub.image_size)
        # All connections come from Ray's proxy, which forwards the address of the client.
        gate = Gate(security, tokens=tokens, host=args.host, origins=args.allow_origin)
        return make_app(
            hub,
            warm_up=False,
            middleware=[Middleware(logs.RequestLog), *protection(gate, args.allow_origin)],
            routes=[Metrics(hub, gate).route()],
        )

    @serve.ingress(build)
    class Server:
        """One replica."""

    least, most = args.replicas
    replicas = {"num_replicas": least}
    if most > least:
        # A stream is a long-running request. A replica is added while the others still have free slots.
        taken = max(1.0, args.slots - args.free_streams)
        autoscaling = AutoscalingConfig(min_replicas=least, max_replicas=most, target_ongoing_requests=taken)
        replicas = {"autoscaling_config": autoscaling}
    return serve.deployment(
        Server,
        name="moss_jax",
        max_ongoing_requests=args.slots + SPARE_REQUESTS,
        request_router_config=RequestRouterConfig(request_router_class=StickyRouter),
        ray_actor_options={"num_cpus": args.cpus_per_replica, "num_gpus": args.gpus_per_replica},
        # A replica that is scaled down drains its streams, then notifies and saves those that are left.
        graceful_shutdown_timeout_s=args.drain_seconds,
        **replicas,
    ).bind()


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""

    def replicas(text: str) -> tuple[int, int]:
        least, _, most = text.partition(":")
        return int(least), int(most or least)

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address that the fleet listens at")
    add("--port", type=int, default=8765)
    add("--checkpoint", help="as for serve.py")
    add("--slots", type=int, default=4, help="streams of a replica")
    add("--replicas", type=replicas, default=(1, 1), metavar="N[:MOST]", help="how many; with MOST, by load")
    add("--free-streams", type=float, default=1.0, help="free ones a replica, below which another is started")
    add("--cpus-per-replica", type=float, default=1)
    add("--gpus-per-replica", type=float, default=0)
    add(
        "--drain-seconds",
        type=float,
        default=600,
        help="for the streams of a replica that is no longer needed",
    )
    add("--state-dir", type=Path, help="folder where streams are saved, of all machines")
    add("--token-file", type=Path, help="as for serve.py")
    add("--allow-origin", action="append", default=[], help="as for serve.py")
    add("--no-warm-up", dest="warm_up", action="store_false", help="compile as programs are needed")
    add("--address", help="of a running Ray cluster (default: a new one on this machine)")
    add("--gin_file", action="append", default=[])
    add("--gin_param", action="append", default=[])
    return parser.parse_args()


def main() -> None:
    """Serves until SIGINT or SIGTERM."""
    args = parse_arguments()
    fleet = deployment(args)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    ray.init(address=args.address, include_dashboard=False)
    serve.start(http_options=HTTPOptions(host=args.host, port=args.port, request_timeout_s=None))
    serve.run(fleet, name="moss_jax")
    print("ready", flush=True)
    stopped.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
