"""Write DIR/train.lmdb and DIR/val.lmdb of a folder of images: --dir DIR [--verify]."""

from utils.data.lmdb_writer import main

if __name__ == "__main__":
    main(description=__doc__)
