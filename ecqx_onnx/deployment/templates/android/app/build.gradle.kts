plugins {
    id("com.android.application")
    id("org.jetbrains.kotlin.android")
}

val onnxruntimeVersion: String by project

// The model and its golden cases become assets under model/, the runner sources of the app.
val copyModel by tasks.registering(Sync::class) {
    from(rootDir) { include("model.onnx", "golden.txt", "golden/**") }
    into(layout.buildDirectory.dir("deployed/assets/model"))
}
val copyRunner by tasks.registering(Sync::class) {
    from(rootDir) { include("EcqxModel.kt", "EcqxJob.kt") }
    into(layout.buildDirectory.dir("deployed/kotlin/ecqx"))
}

android {
    namespace = "ecqx.sample"
    compileSdk = 35

    defaultConfig {
        applicationId = "ecqx.sample"
        minSdk = 24
        targetSdk = 35
        versionCode = 1
        versionName = "1.0"
    }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
    kotlinOptions { jvmTarget = "17" }
    sourceSets["main"].assets.srcDir(layout.buildDirectory.dir("deployed/assets"))
    sourceSets["main"].kotlin.srcDir(layout.buildDirectory.dir("deployed/kotlin"))
}

tasks.named("preBuild") { dependsOn(copyModel, copyRunner) }

dependencies {
    implementation("com.microsoft.onnxruntime:onnxruntime-android:$onnxruntimeVersion")
}
