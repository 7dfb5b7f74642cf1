# Writes OUT with the commit that is checked out: cmake -DOUT=... -DSOURCE=... -P commit.cmake
execute_process(COMMAND git rev-parse --short=12 HEAD WORKING_DIRECTORY ${SOURCE}
                OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
if(failed OR commit STREQUAL "")
  set(commit "unknown")
endif()
file(WRITE ${OUT} "#include \"apps/command_line/commit.h\"\nnamespace perigee {\nconst char* const kCommit = \"${commit}\";\n}\n")
