"""`python -m actionclip_deploy.cli`, for where the entry point is not on the path."""

from actionclip_deploy.cli import main

main()
