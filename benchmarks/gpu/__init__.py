"""Tests and benchmarks for a machine with one GPU and no network: tests.sh, train.sh and sample.sh."""
