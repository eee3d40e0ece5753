"""What runtimes read of an adapter, and adapters made to fit."""
