from lasnn.cli import main

main()
