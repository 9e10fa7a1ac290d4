import gc


def pytest_collection_finish(session):
    """What collection has loaded stays: millions of objects that no later search for garbage looks at again."""
    gc.collect()
    gc.freeze()
