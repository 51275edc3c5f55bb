from .entries import EachEntry as EachEntry, Fault as Fault
from .ledger import Ledger as Ledger, Shard as Shard, Shards as Shards
from .opening import open_engine as open_engine
from .protocol import Engine as Engine, Stage as Stage, Worker as Worker
from .running import run_pieces as run_pieces
from .throughput import Throughput as Throughput
