# cmake --install BUILD --prefix X: bin/perigee, lib/ with every shared library it needs but glibc's, share/perigee/ with
# the configurations and documents. The tree runs wherever it is put: on a machine with a glibc not older than this
# one's, without compilers or packages, with a GPU or without.

# RPATH, not RUNPATH: the libraries in lib/ find one another by it too.
set_target_properties(perigee-bin PROPERTIES INSTALL_RPATH "$ORIGIN/../lib")
target_link_options(perigee-bin PRIVATE -Wl,--disable-new-dtags)

install(TARGETS perigee-bin RUNTIME_DEPENDENCY_SET perigee_libraries RUNTIME DESTINATION bin)
# glibc belongs to the kernel and the loader of the machine, libcuda to its driver.
install(RUNTIME_DEPENDENCY_SET perigee_libraries
        PRE_EXCLUDE_REGEXES "^ld-linux" "^lib(c|m|mvec|dl|rt|pthread|resolv|util|anl|nsl|nss_[a-z]+)\\.so" "^libcuda\\.so"
        LIBRARY DESTINATION lib)
install(DIRECTORY configs docs DESTINATION share/perigee)
install(FILES README.md LICENSE DESTINATION share/perigee)
