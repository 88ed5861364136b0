"""`python -m actionclip_deploy`: the command line, for where `actionclip` is not on the path."""

from actionclip_deploy.cli import main

main()
