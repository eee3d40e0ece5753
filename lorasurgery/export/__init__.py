"""What runtimes load: graphs and directories, and the surgery on them."""
