import gc
import os


def pytest_collection_finish(session):
    """What collection has loaded stays: millions of objects that no later search for garbage looks at again."""
    gc.collect()
    gc.freeze()


def pytest_xdist_auto_num_workers(config):
    """Half as many again as cores: for a third of their time tests wait, for other processes, servers and clocks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores + (cores + 1) // 2
