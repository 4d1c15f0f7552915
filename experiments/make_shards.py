"""Write DIR/train and DIR/val as tar shards, DIR/train-000000.tar and so on: --dir DIR."""

from utils.data.shard_writer import main

if __name__ == "__main__":
    main(description=__doc__)
