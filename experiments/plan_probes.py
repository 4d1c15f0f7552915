"""What kNN or the linear probe takes in memory and time: --probe knn --train N --processes W."""

from evaluation.probes.plan import main

if __name__ == "__main__":
    main()
